"""Low rank: factors of a weight, and the smaller layers that hold them."""
