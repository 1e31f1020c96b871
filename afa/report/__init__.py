"""What a person sees of a run: the progress line, the metric files, images and `report.html`."""
