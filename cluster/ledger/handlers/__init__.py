"""What each event does to the books."""
