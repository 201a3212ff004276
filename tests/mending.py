"""Changes to a bundle whose hashes are mended afterwards, as an attacker or a careless tool would."""

import json

import numpy as np

from diffexport.bundle import CERTIFICATE, GOLDEN, MANIFEST, entry_of, read_tensors, write_tensors


def edit_json(path, change):
    """Change a JSON file in place; ``change`` alters what it is given."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rehash(path, *names):
    """Make the manifest vouch for changed files, and the certificate for the manifest."""
    entries = {name: entry_of(path / name) for name in names}

    def vouch(manifest):
        for name, entry in entries.items():
            manifest["files"][name] = {"size": entry.size, "sha256": entry.sha256}

    edit_json(path / MANIFEST, vouch)
    edit_json(path / CERTIFICATE, lambda c: c.update(manifest_sha256=entry_of(path / MANIFEST).sha256))


def shift_golden(path, name, by=0.01):
    """Change a recorded result, so that every runtime differs from it."""
    cases = read_tensors(path / GOLDEN)
    cases[name] = cases[name] + np.float32(by)
    write_tensors(path / GOLDEN, cases)
    rehash(path, GOLDEN)
