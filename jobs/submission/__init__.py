"""A job run on a cluster: what is asked, the code that is sent, the server that takes it, and following it."""
