"""A folder that was converted for CTranslate2.

`ct2-transformers-converter` copies what lies beside the weights with
`--copy_files tokenizer.json tokenizer_config.json`.
"""

from __future__ import annotations

from deployments.engines.chat.hf_folder import HfFolder


class Ct2Folder(HfFolder):
    """What a converted folder says of its model. Raises `ModelUnavailable` as `HfFolder` does."""

    needed = ("model.bin", *HfFolder.needed)
    what = "a model converted for CTranslate2"

    @property
    def weights_mib(self) -> int:
        """The size of the weights on disk."""
        return -(-(self._path / "model.bin").stat().st_size >> 20)
