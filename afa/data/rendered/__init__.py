"""The pictures of the embedded data set: procedural objects, ray-cast with NumPy alone."""
