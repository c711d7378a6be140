"""The front door: HTTP families, wire adapters, the command line and the application builder."""
