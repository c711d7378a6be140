"""Who may run: configuration, the error tree, the pure ledger with its policies, and the actor around it."""
