"""One thin adapter per host; each is imported only by name, and with it its host."""
