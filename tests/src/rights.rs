//! Roles that may do no more than the documentation grants them.

use sqlx::postgres::PgConnectOptions;

use crate::{PostgresSchema, Sql};

/// The grants that a crate's documentation tells, which are for `service` on the schema `durable`.
pub fn documented(documentation: &str, schema: &str, role: &str) -> Vec<String> {
    let grants = documentation.lines().filter_map(|line| line.strip_prefix("//! GRANT "));
    let grants: Vec<String> = grants
        .map(|grant| {
            let (rights, whose) = grant.trim_end_matches(';').rsplit_once("durable").expect("the schema");
            format!("GRANT {rights}{schema}{}", whose.replace("service", role))
        })
        .collect();
    assert!(!grants.is_empty(), "no grants are documented");
    grants
}

/// A role of PostgreSQL's beside the tests' own.
pub struct Role<'s> {
    schema: &'s PostgresSchema,
    name: String,
}

impl<'s> Role<'s> {
    /// One that may do nothing.
    pub async fn new(schema: &'s PostgresSchema) -> Self {
        let role = Self { schema, name: schema.name().replace("test_", "role_") };
        role.execute("CREATE ROLE {r} LOGIN PASSWORD 'secret'").await;
        role
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The database's address, as this role.
    pub fn url(&self) -> String {
        let options: PgConnectOptions = self.schema.url().parse().unwrap();
        let (host, port, database) = (options.get_host(), options.get_port(), options.get_database().unwrap());
        format!("postgres://{}:secret@{host}:{port}/{database}?application_name={}", self.name, self.schema.name())
    }

    /// All that it needs to run, and no more.
    pub async fn grant(&self) {
        let documentation = include_str!("../../durable-postgres/src/lib.rs");
        for grant in documented(documentation, self.schema.name(), &self.name) {
            self.execute(&grant).await;
        }
    }

    /// Statements with `{r}` for the role.
    pub async fn execute(&self, sql: &str) {
        self.schema.execute(&sql.replace("{r}", &self.name)).await;
    }

    /// To be called at the end.
    pub async fn drop(self) {
        self.execute("DROP OWNED BY {r}; DROP ROLE {r}").await;
    }
}
