"""The synthetic data set: ray-cast images of procedural objects, with NumPy alone."""
