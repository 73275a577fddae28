"""Evidence of a run, the report that it supports, and the verdict."""
