"""What tests of this project and of its users share: cases, comparisons, slow twins, tiny models."""
