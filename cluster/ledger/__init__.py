"""The pure ledger: no Ray, no asyncio, no clock of its own."""
