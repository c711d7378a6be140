"""Judgement: what should happen. Nothing here changes the state."""
