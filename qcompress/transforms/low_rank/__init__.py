"""Lower rank: factors, and the smaller layers that hold them."""
