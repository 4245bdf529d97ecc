"""Train networks of exact spike times, search their settings and draw them."""
