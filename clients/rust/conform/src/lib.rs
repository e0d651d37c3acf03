//! The program through which the conformance kit drives the crate `zcproto` (clients/conformance/README.md), and the parts of
//! it that the tests of the vectors use.

pub mod outcomes;
pub mod steps;
pub mod typed;
mod vector_steps;
