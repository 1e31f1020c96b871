"""The images of the synthetic data set: procedural objects, ray-cast with NumPy alone."""
