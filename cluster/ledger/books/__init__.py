"""The ledger's state and its primitive moves."""
