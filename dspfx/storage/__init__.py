"""Files: what they hold, and how a model is built from them."""
