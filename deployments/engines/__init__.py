"""One file per engine, each behind the protocol in `protocol.py`; engine libraries are imported lazily."""
