"""What several test files share: weights, inputs and modules to test."""
