"""What runs: the Serve deployments (ingress host, model replica) and one file per engine."""
