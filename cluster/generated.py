"""The files in `docs/` that are made from the code, so that they cannot be wrong: `python -m cluster.generated docs`.

A page that is only in part made from the code has marks around that part.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from cluster.config import reference, schema
from cluster.diagram import mermaid

MARKED = re.compile(r"(?<=<!-- made from cluster/ledger/states\.py -->\n).*?(?=<!-- end -->)", re.DOTALL)


def generated(docs: Path) -> dict[Path, str]:
    """Each file's content as it ought to be. Reads the pages that are made in part."""
    made = {docs / name: schema.text(each) for name, each in schema.schemas().items()}
    made[docs / "configuration.md"] = reference.markdown(schema.schemas()[schema.POOL])
    concepts = docs / "concepts.md"
    diagram = f"```mermaid\n{mermaid()}\n```\n"
    made[concepts] = MARKED.sub(lambda _: diagram, concepts.read_text(encoding="utf-8"))
    return made


if __name__ == "__main__":
    for path, text in generated(Path(sys.argv[1])).items():
        path.write_text(text, encoding="utf-8")
