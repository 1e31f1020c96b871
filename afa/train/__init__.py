"""Training: the state, the pure steps, the optimisers, and the loop that drives them."""
