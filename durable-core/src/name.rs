use std::borrow::Cow;
use std::fmt::Display;

/// What an operation is called: a name, or a name with a key, for operations in a loop.
///
/// The name is the identity of the operation's record. Name and key are kept in two columns and never joined, so
/// `("a", "b:c")` and `("a:b", "c")` are two names.
///
/// ```
/// # use durable_core::Name;
/// # let item_id = 7;
/// let plain: Name = "ship".into();
/// let keyed: Name = ("charge", item_id).into();
/// assert_eq!(keyed.key(), "7");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name {
    name: Cow<'static, str>,
    key: Box<str>,
}

impl Name {
    /// The name without its key.
    pub fn name(&self) -> &str {
        &self.name
    }
    /// The key; empty if there is none.
    pub fn key(&self) -> &str {
        &self.key
    }
}

impl From<&'static str> for Name {
    fn from(name: &'static str) -> Self {
        Self { name: name.into(), key: "".into() }
    }
}
impl From<String> for Name {
    fn from(name: String) -> Self {
        Self { name: name.into(), key: "".into() }
    }
}
impl<K: Display> From<(&'static str, K)> for Name {
    fn from((name, key): (&'static str, K)) -> Self {
        Self { name: name.into(), key: key.to_string().into() }
    }
}
impl<K: Display> From<(String, K)> for Name {
    fn from((name, key): (String, K)) -> Self {
        Self { name: name.into(), key: key.to_string().into() }
    }
}
