"""What a person sees of a run: the progress line, the metric files, pictures and `report.html`."""
