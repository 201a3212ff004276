"""How a refusal has to look."""


def assert_refused(result, message, status=1):
    """One clear line on stderr, after what an export said it takes, nothing on stdout, a status that is not 0."""
    code, out, err = result
    assert (code, out) == (status, "")
    lines = [line for line in err.splitlines() if not line.startswith("exporting takes about ")]
    assert len(lines) == 1
    assert lines[0].startswith("diffx: error: ")
    assert message in lines[0]
