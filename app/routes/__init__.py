"""One file per family of routes. A route parses and renders; it decides nothing."""
