"""What every method of the package must do, on a decoder and on an encoder.

A new method needs one entry in `EXAMPLES`; the tests find every concrete `Method` by themselves.
"""
