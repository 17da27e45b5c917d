"""The guest's network, set up by a short-lived child of the agent."""
