"""Files and text, shared by every layer below."""
