"""What the vectors are made from. Nothing here imports zcproto: it is a second witness of the format."""
