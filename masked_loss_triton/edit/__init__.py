"""The local page of `masked-loss edit`: look at the masks of a data set, see the weights the loss will use, and mend them."""
