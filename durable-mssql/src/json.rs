//! Rows that travel as one parameter: a JSON array of arrays, which the server reads as a table.

use durable_core::storage::RunId;
use std::io::Write;
use uuid::Uuid;

use crate::sql::Sql;

/// What a column of such a table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Column {
    /// A run, an instance.
    Id,
    Number,
    Bit,
    /// A part of a key, of so many units, compared as the tables compare it.
    Key(u16),
    /// Of any length, and not compared.
    Text,
    Time,
}

/// A value of a row.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Cell<'c> {
    Id(Uuid),
    Number(i64),
    Bit(bool),
    Text(&'c str),
    Null,
}

impl From<RunId> for Cell<'_> {
    fn from(run: RunId) -> Self {
        Self::Id(run.0)
    }
}

impl From<i64> for Cell<'_> {
    fn from(number: i64) -> Self {
        Self::Number(number)
    }
}

impl From<usize> for Cell<'_> {
    fn from(number: usize) -> Self {
        Self::Number(i64::try_from(number).unwrap_or(i64::MAX))
    }
}

impl From<bool> for Cell<'_> {
    fn from(bit: bool) -> Self {
        Self::Bit(bit)
    }
}

impl<'c> From<&'c str> for Cell<'c> {
    fn from(text: &'c str) -> Self {
        Self::Text(text)
    }
}

impl<'c, T: Into<Cell<'c>>> From<Option<T>> for Cell<'c> {
    fn from(value: Option<T>) -> Self {
        value.map_or(Self::Null, Into::into)
    }
}

/// A table under construction.
pub(crate) struct Table {
    columns: &'static [(&'static str, Column)],
    json: Vec<u8>,
}

impl Table {
    pub(crate) fn new(columns: &'static [(&'static str, Column)]) -> Self {
        Self { columns, json: vec![b'['] }
    }

    /// Appends a row.
    pub(crate) fn row<const N: usize>(&mut self, cells: [Cell<'_>; N]) {
        debug_assert_eq!(N, self.columns.len());
        if self.json.len() > 1 {
            self.json.push(b',');
        }
        self.json.push(b'[');
        for (nth, cell) in cells.into_iter().enumerate() {
            if nth > 0 {
                self.json.push(b',');
            }
            // Writing to memory does not fail.
            let _ = match cell {
                Cell::Id(id) => write!(self.json, "\"{}\"", id.simple()),
                Cell::Number(number) => write!(self.json, "{number}"),
                Cell::Bit(bit) => write!(self.json, "{bit}"),
                Cell::Text(text) => escaped(&mut self.json, text),
                Cell::Null => write!(self.json, "null"),
            };
        }
        self.json.push(b']');
    }

    /// The table as a source of rows, with this name in the text.
    pub(crate) fn named(mut self, sql: &mut Sql, name: &str) -> String {
        self.json.push(b']');
        // It was put together from text.
        let parameter = sql.text(String::from_utf8(self.json).unwrap_or_default());
        source(self.columns, &parameter, name)
    }
}

/// One column of runs.
pub(crate) fn runs(sql: &mut Sql, runs: impl IntoIterator<Item = RunId>) -> String {
    let mut table = Table::new(&[("run", Column::Id)]);
    for run in runs {
        table.row([run.into()]);
    }
    table.named(sql, "j")
}

/// One column of ids.
pub(crate) fn ids<'i>(sql: &mut Sql, ids: impl IntoIterator<Item = &'i str>) -> String {
    let mut table = Table::new(&[("id", Column::Key(256))]);
    for id in ids {
        table.row([id.into()]);
    }
    table.named(sql, "j")
}

fn source(columns: &[(&str, Column)], parameter: &str, name: &str) -> String {
    let (mut selected, mut read) = (Vec::new(), Vec::new());
    for (nth, (column, kind)) in columns.iter().enumerate() {
        let (value, sent) = match kind {
            Column::Id => (format!("CONVERT(BINARY(16), r.[{column}], 2)"), "NVARCHAR(32)".to_owned()),
            Column::Number => (format!("r.[{column}]"), "BIGINT".to_owned()),
            Column::Bit => (format!("r.[{column}]"), "BIT".to_owned()),
            // Twice as long, should every unit be escaped.
            Column::Key(units) => (unescaped(column, &MARKS), format!("NVARCHAR({})", 2 * units)),
            Column::Text => (unescaped(column, &[&SPACES[..], &MARKS].concat()), "NVARCHAR(MAX)".to_owned()),
            Column::Time => (format!("CONVERT(DATETIME2(6), r.[{column}], 126)"), "NVARCHAR(40)".to_owned()),
        };
        selected.push(format!("{value} AS [{column}]"));
        read.push(format!("[{column}] {sent} '$[{nth}]'"));
    }
    let (selected, read) = (selected.join(", "), read.join(", "));
    format!("(SELECT {selected} FROM OPENJSON({parameter}) WITH ({read}) AS r) AS {name}")
}

/// How a unit is escaped, and what stands for it in SQL: as JSON Pointer (RFC 6901) does it. Not every server that speaks
/// the protocol undoes JSON's own escapes. The mark itself is the last to be undone.
const MARKS: [(&str, &str); 3] = [("~1", "N'\"'"), ("~2", "N'\\'"), ("~0", "N'~'")];
/// Spaces that JSON does not allow within a string; keys have none.
const SPACES: [(&str, &str); 3] = [("~3", "NCHAR(10)"), ("~4", "NCHAR(9)"), ("~5", "NCHAR(13)")];

fn escaped(json: &mut Vec<u8>, text: &str) -> std::io::Result<()> {
    json.push(b'"');
    for byte in text.bytes() {
        match byte {
            b'~' => json.extend(b"~0"),
            b'"' => json.extend(b"~1"),
            b'\\' => json.extend(b"~2"),
            b'\n' => json.extend(b"~3"),
            b'\t' => json.extend(b"~4"),
            b'\r' => json.extend(b"~5"),
            0..0x20 => write!(json, "\\u{byte:04x}")?,
            other => json.push(other),
        }
    }
    json.push(b'"');
    Ok(())
}

fn unescaped(column: &str, escapes: &[(&str, &str)]) -> String {
    let text = format!("r.[{column}] COLLATE Latin1_General_BIN2");
    escapes.iter().fold(text, |text, (escape, unit)| format!("REPLACE({text}, N'{escape}', {unit})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_as_json() {
        let mut table = Table::new(&[("run", Column::Id), ("n", Column::Number), ("t", Column::Text)]);
        table.row([Cell::Id(Uuid::nil()), 1_i64.into(), "a\"\\~1\u{1}é\n".into()]);
        table.row([Cell::Null, Cell::Null, None::<&str>.into()]);
        let id = "0".repeat(32);
        assert_eq!(
            String::from_utf8(table.json).unwrap(),
            format!(r#"[["{id}",1,"a~1~2~01\u0001é~3"],[null,null,null]"#)
        );
    }
}
