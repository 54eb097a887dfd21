//! The cases that every storage must pass.
