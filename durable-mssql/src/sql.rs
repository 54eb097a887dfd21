use durable_core::storage::Result;
use futures_util::TryStreamExt;
use std::borrow::Cow;
use std::fmt::Write;
use std::ops::Deref;
use tiberius::{QueryItem, Row, ToSql};
use tracing::instrument::WithSubscriber;
use tracing::subscriber::NoSubscriber;
use uuid::Uuid;

use crate::errors::sort;
use crate::session::Client;

/// A request: a script of one or more statements, and what is bound to it. What users give is bound, never written into
/// the text.
#[derive(Debug, Default)]
pub(crate) struct Sql {
    declarations: String,
    statements: String,
    parameters: Vec<Parameter>,
}

#[derive(Debug)]
enum Parameter {
    Text(String),
    Number(i64),
    Bit(bool),
}

/// What becomes of a connection that is lost on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Commits {
    /// The script commits what it writes.
    Yes,
    /// It only reads, or may as well run twice, or its transaction's commit comes later.
    No,
}

impl Sql {
    fn parameter(&mut self, parameter: Parameter) -> String {
        self.parameters.push(parameter);
        format!("@P{}", self.parameters.len())
    }

    /// Binds a text; the answer stands for it. Never null: the text says where nothing is.
    pub(crate) fn text(&mut self, value: impl Into<String>) -> String {
        self.parameter(Parameter::Text(value.into()))
    }

    pub(crate) fn number(&mut self, value: i64) -> String {
        self.parameter(Parameter::Number(value))
    }

    pub(crate) fn count(&mut self, value: usize) -> String {
        self.number(i64::try_from(value).unwrap_or(i64::MAX))
    }

    pub(crate) fn bit(&mut self, value: bool) -> String {
        self.parameter(Parameter::Bit(value))
    }

    /// A run, an instance. As text: what is bound as bytes has a type of any length, which an index of a column of 16
    /// would not be looked up by.
    pub(crate) fn id(&mut self, id: Uuid) -> String {
        let text = self.text(hex(id));
        format!("CONVERT(BINARY(16), {text}, 2)")
    }

    /// Appends a statement.
    pub(crate) fn push(&mut self, statement: impl AsRef<str>) {
        // Writing to a string does not fail.
        let _ = writeln!(self.statements, "{};", statement.as_ref().trim_end());
    }

    /// Declares something, before all statements: a table is not made within a transaction.
    pub(crate) fn declare(&mut self, what: &str) {
        let _ = writeln!(self.declarations, "DECLARE {what};");
    }

    /// The script.
    pub(crate) fn script(&self) -> String {
        format!("{}{}", self.declarations, self.statements)
    }

    /// Runs it to the end of its answer, so that whatever it commits is committed.
    pub(crate) async fn run(self, client: &mut Client, commits: Commits) -> Result<Parts> {
        self.fetch(client).await.map_err(|error| sort(error, commits))
    }

    /// Runs one that only reads, while `welcome` says yes to each row, which it gets with the place of the row's query.
    /// [`None`] if it has said no; then the rest of the answer is still to come.
    pub(crate) async fn run_while(
        self,
        client: &mut Client,
        mut welcome: impl FnMut(usize, &Row) -> bool,
    ) -> Result<Option<Parts>> {
        let parameters: Vec<&dyn ToSql> = self.parameters.iter().map(|parameter| parameter as &dyn ToSql).collect();
        let read = async {
            let mut answer = client.query(self.script(), &parameters).await?;
            let mut parts: Vec<Vec<Row>> = Vec::new();
            while let Some(item) = answer.try_next().await? {
                match item {
                    QueryItem::Metadata(_) => parts.push(Vec::new()),
                    QueryItem::Row(row) => {
                        let nth = parts.len().saturating_sub(1);
                        if !welcome(nth, &row) {
                            return Ok(None);
                        }
                        if let Some(part) = parts.last_mut() {
                            part.push(row);
                        }
                    }
                }
            }
            Ok(Some(Parts(parts)))
        };
        read.with_subscriber(NoSubscriber::default()).await.map_err(|error| sort(error, Commits::No))
    }

    /// Runs it on a connection of the service's own.
    pub(crate) async fn fetch<S>(self, client: &mut tiberius::Client<S>) -> tiberius::Result<Parts>
    where
        S: futures_io::AsyncRead + futures_io::AsyncWrite + Unpin + Send,
    {
        let parameters: Vec<&dyn ToSql> = self.parameters.iter().map(|parameter| parameter as &dyn ToSql).collect();
        let rows = async { client.query(self.script(), &parameters).await?.into_results().await.map(Parts) };
        // The driver logs every row that it reads, and errors in which the server quotes values.
        rows.with_subscriber(NoSubscriber::default()).await
    }
}

/// What a script answers with: the rows of each of its queries.
#[derive(Debug)]
pub(crate) struct Parts(Vec<Vec<Row>>);

impl Parts {
    /// All of them.
    pub(crate) fn rows(self) -> Vec<Row> {
        self.0.into_iter().flatten().collect()
    }
}

impl Deref for Parts {
    type Target = [Vec<Row>];
    fn deref(&self) -> &[Vec<Row>] {
        &self.0
    }
}

impl ToSql for Parameter {
    fn to_sql(&self) -> tiberius::ColumnData<'_> {
        match self {
            Self::Text(text) => tiberius::ColumnData::String(Some(Cow::Borrowed(text))),
            Self::Number(number) => tiberius::ColumnData::I64(Some(*number)),
            Self::Bit(bit) => tiberius::ColumnData::Bit(Some(*bit)),
        }
    }
}

pub(crate) fn hex(id: Uuid) -> String {
    id.simple().to_string()
}

/// An id as text, in SQL. Not every server that speaks the protocol converts bytes to digits; all write out a
/// `UNIQUEIDENTIFIER`, whose first three groups are turned around.
pub(crate) fn hyphenated(id: &str) -> String {
    let text = format!("CONVERT(NVARCHAR(36), CONVERT(UNIQUEIDENTIFIER, {id}))");
    let groups: [&[(u8, u8)]; 5] =
        [&[(7, 2), (5, 2), (3, 2), (1, 2)], &[(12, 2), (10, 2)], &[(17, 2), (15, 2)], &[(20, 4)], &[(25, 12)]];
    let groups = groups.map(|parts| {
        let parts = parts.iter().map(|(start, length)| format!("SUBSTRING({text}, {start}, {length})"));
        parts.collect::<Vec<_>>().join(", ")
    });
    format!("LOWER(CONCAT({}))", groups.join(", N'-', "))
}
