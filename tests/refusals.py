"""How a refusal has to look."""


def assert_refused(result, message, status=1):
    """One clear line on stderr, nothing on stdout, a status that is not 0."""
    code, out, err = result
    assert (code, out) == (status, "")
    assert err.count("\n") == 1
    assert err.startswith("diffx: error: ")
    assert message in err
