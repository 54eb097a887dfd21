use std::io::Write;
use std::sync::Arc;
use uuid::Uuid;

use crate::script::Arg;

/// A value in a row that travels to SQLite in a JSON array.
pub(crate) enum Cell<'c> {
    Text(&'c str),
    Owned(String),
    Int(i64),
    Id(Uuid),
    Null,
}

impl<'c> From<&'c str> for Cell<'c> {
    fn from(text: &'c str) -> Self {
        Self::Text(text)
    }
}
impl<'c> From<&'c Box<str>> for Cell<'c> {
    fn from(text: &'c Box<str>) -> Self {
        Self::Text(text)
    }
}
impl<'c> From<&'c Arc<str>> for Cell<'c> {
    fn from(text: &'c Arc<str>) -> Self {
        Self::Text(text)
    }
}
impl From<String> for Cell<'_> {
    fn from(text: String) -> Self {
        Self::Owned(text)
    }
}
impl From<i64> for Cell<'_> {
    fn from(number: i64) -> Self {
        Self::Int(number)
    }
}
impl From<Uuid> for Cell<'_> {
    fn from(id: Uuid) -> Self {
        Self::Id(id)
    }
}
impl<'c, T: Into<Cell<'c>>> From<Option<T>> for Cell<'c> {
    fn from(value: Option<T>) -> Self {
        value.map_or(Self::Null, Into::into)
    }
}

impl Cell<'_> {
    /// As what is bound to a statement.
    pub(crate) fn arg(&self) -> Arg {
        match self {
            Self::Text(text) => (*text).into(),
            Self::Owned(text) => text.as_str().into(),
            Self::Int(number) => (*number).into(),
            Self::Id(id) => id.to_string().into(),
            Self::Null => Arg::Null,
        }
    }

    /// Whether it is the same as what is bound.
    pub(crate) fn is(&self, arg: &Arg) -> bool {
        match (self, arg) {
            (Self::Text(text), Arg::Text(bound)) => **text == **bound,
            (Self::Owned(text), Arg::Text(bound)) => **text == **bound,
            (Self::Int(number), Arg::Int(bound)) => number == bound,
            (Self::Null, Arg::Null) => true,
            _ => false,
        }
    }
}

/// Rows as a JSON array of arrays, written without a detour through JSON values. A payload travels as a JSON *string*,
/// so that it arrives byte for byte.
#[derive(Default)]
pub(crate) struct Rows(Vec<u8>);

impl Rows {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn push<'c>(&mut self, cells: impl IntoIterator<Item = Cell<'c>>) {
        self.0.extend(if self.0.is_empty() { b"[[" } else { b",[" });
        for (nth, cell) in cells.into_iter().enumerate() {
            if nth > 0 {
                self.0.push(b',');
            }
            // Writing to memory does not fail.
            let _ = match cell {
                Cell::Text(text) => self.text(text),
                Cell::Owned(text) => self.text(&text),
                Cell::Int(number) => write!(self.0, "{number}"),
                Cell::Id(id) => {
                    let mut buffer = Uuid::encode_buffer();
                    write!(self.0, "\"{}\"", id.hyphenated().encode_lower(&mut buffer))
                }
                Cell::Null => write!(self.0, "null"),
            };
        }
        self.0.push(b']');
    }

    fn text(&mut self, text: &str) -> std::io::Result<()> {
        serde_json::to_writer(&mut self.0, text).map_err(Into::into)
    }

    pub(crate) fn arg(mut self) -> Arg {
        self.0.extend(if self.0.is_empty() { &b"[]"[..] } else { b"]" });
        let text: Arc<str> = String::from_utf8_lossy(&self.0).into();
        Arg::Text(text)
    }
}

/// Cells of anything that can be one.
macro_rules! cells {
    ($($value:expr),* $(,)?) => { [$($crate::cells::Cell::from($value)),*] };
}
pub(crate) use cells;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_json() {
        let mut rows = Rows::default();
        rows.push(cells!["a\"\u{1}é", 7_i64, None::<&str>, Uuid::nil()]);
        rows.push(cells![String::from("{\"x\":\"\\u0000\"}")]);
        let Arg::Text(text) = rows.arg() else { panic!() };
        let back: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(back, serde_json::json!([["a\"\u{1}é", 7, null, Uuid::nil().to_string()], ["{\"x\":\"\\u0000\"}"]]));
    }
}
