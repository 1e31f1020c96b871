"""Rendering of `report.html`, its charts, and images of search results."""
