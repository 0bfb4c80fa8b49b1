"""Where the weights of an EpiFoundation start: LSI, means of the genes, a ridge regression."""
