"""Training: state, steps (pure functions), optimisers and the loop."""
