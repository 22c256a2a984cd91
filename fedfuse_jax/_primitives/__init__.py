"""Every operation's declaration, and what its derivatives and shards are, one family a file."""
