"""A report as a page for people: charts as geometry, and the templates."""
