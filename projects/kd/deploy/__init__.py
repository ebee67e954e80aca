"""Students in use: exported to other formats, run from there, and compared with what they were."""
