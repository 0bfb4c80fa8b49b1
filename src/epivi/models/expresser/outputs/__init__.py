"""What a trained Expresser tells: vectors of genes and cells, imputed values, a network of genes."""
