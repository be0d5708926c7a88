"""The only folder that imports Ray. Importing it does not import TensorFlow."""
