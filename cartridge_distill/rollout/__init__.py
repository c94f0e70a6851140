"""The client's side of a rollout: the protocol, HTTP with patience, the client."""
