"""One file for each command of `slotpool`; each is imported when it is used."""
