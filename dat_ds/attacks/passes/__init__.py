"""How an attack's forwards and backwards are made cheaper; none of them is an attack."""
