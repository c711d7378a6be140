"""Fetch the status page's libraries from the npm registry into `app/ui/vendor`: `make vendor-ui`.

`manifest.json` there names packages, versions and files. A file whose digest is another than the manifest's is refused;
after a change of a version, `make vendor-ui ARGS=--update` writes the new digests. Needs npm.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "app" / "ui" / "vendor"
MANIFEST = FOLDER / "manifest.json"


def main(update: bool) -> None:
    """Raises `SystemExit` with the file that is not what the manifest says."""
    manifest = json.loads(MANIFEST.read_text())
    for package in manifest["packages"]:
        with tempfile.TemporaryDirectory() as folder:
            name = f"{package['name']}@{package['version']}"
            subprocess.run(["npm", "pack", "--silent", "--pack-destination", folder, name], check=True)
            (archive,) = Path(folder).glob("*.tgz")
            with tarfile.open(archive) as packed:
                packed.extractall(folder, filter="data")
            for file in package["files"]:
                content = Path(folder, "package", file["source"]).read_bytes()
                digest = hashlib.sha256(content).hexdigest()
                if update:
                    file["sha256"] = digest
                elif digest != file["sha256"]:
                    sys.exit(f"{name}: {file['source']} is not the file that the manifest means")
                (FOLDER / file["name"]).write_bytes(content)
        print(f"{name}: {len(package['files'])} files")
    MANIFEST.write_text(json.dumps(manifest, indent=2) + "\n")


if __name__ == "__main__":
    main("--update" in sys.argv[1:])
