"""Parts of the public package that need no cluster."""
