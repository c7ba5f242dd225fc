//! Users, memberships, invitations, sessions and the keys that sign tokens. What belongs to no tenant is reached by
//! functions of the database only; hashes of secrets go in and never come out, but for the password's, which `app::people`
//! checks.

use std::time::Duration;

use anyhow::Context as _;
use chrono::{DateTime, Utc};
use sqlx::postgres::PgRow;
use sqlx::postgres::types::PgInterval;
use sqlx::{Connection as _, PgConnection, Row};
use uuid::Uuid;

use crate::domain::ids::{TenantId, UserId};
use crate::domain::permission::{Role, UnknownRole};
use crate::store::tenant::{Actor, Identity};
use crate::store::{ApiStore, Error, Result, TenantConn, WorkerStore};

/// A user, with what a password is checked against.
#[derive(Debug, Clone)]
pub struct UserRow {
    /// Its id.
    pub id: UserId,
    /// Address, in lower case.
    pub email: String,
    /// Name, for people.
    pub name: String,
    /// argon2id, in PHC form.
    pub password_hash: String,
}

/// Where a user is a member.
#[derive(Debug, Clone)]
pub struct MembershipRow {
    /// The tenant.
    pub tenant: TenantId,
    /// Its name.
    pub name: String,
    /// What the user is there.
    pub role: Role,
}

/// A member of a tenant.
#[derive(Debug, Clone)]
pub struct MemberRow {
    /// Id of the user.
    pub id: UserId,
    /// Address.
    pub email: String,
    /// Name.
    pub name: String,
    /// What it is in the tenant.
    pub role: Role,
    /// Since when.
    pub since: DateTime<Utc>,
}

/// An invitation.
#[derive(Debug, Clone)]
pub struct InvitationRow {
    /// Its id.
    pub id: Uuid,
    /// Who is invited.
    pub email: String,
    /// As what.
    pub role: Role,
    /// By whom.
    pub invited_by: String,
    /// When.
    pub created_at: DateTime<Utc>,
    /// Until when it can be accepted.
    pub expires_at: DateTime<Utc>,
    /// When it was.
    pub accepted_at: Option<DateTime<Utc>>,
}

/// How the exchange of a refresh token went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refreshed {
    /// There is a new one, for this session, user and tenant.
    Fine(Uuid, UserId, TenantId),
    /// No session that is open has it.
    Unknown,
    /// It was used before: the session has ended.
    Reused(UserId, TenantId),
    /// The user is no member of that tenant.
    Stranger,
}

/// A key that signs.
#[derive(Debug, Clone)]
pub struct IssuerKeyRow {
    /// Its name in tokens.
    pub kid: String,
    /// The private half; sealed, if a master key is named.
    pub seed: Vec<u8>,
    /// Fingerprint of the master key that seals it.
    pub master: Option<String>,
    /// The public half.
    pub public: Vec<u8>,
    /// When it was made.
    pub created_at: DateTime<Utc>,
}

fn role(row: &PgRow) -> Result<Role> {
    let role: &str = row.try_get("role")?;
    role.parse().map_err(|e: UnknownRole| Error::Corrupt(e.to_string()))
}

pub(super) fn interval(duration: Duration) -> PgInterval {
    let microseconds = i64::try_from(duration.as_micros()).unwrap_or(i64::MAX);
    PgInterval { months: 0, days: 0, microseconds }
}

impl ApiStore {
    /// What a session may now; `None`: it has ended, or its user is no member any more.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn identify_session(&self, session: Uuid) -> Result<Option<Identity>> {
        let work = async {
            let asked = sqlx::query("SELECT * FROM identify_session($1)").bind(session);
            Ok(asked.fetch_optional(&self.pool).await?)
        };
        let row = self.guard.call(work).await?;
        row.map(|row| {
            Ok(Identity {
                tenant: row.try_get("tenant_id")?,
                actor: Actor::User(row.try_get("user_id")?, session),
                name: row.try_get::<String, _>("name")?.into(),
                role: role(&row)?,
                scopes: [].into(),
                expires_at: None,
                active: row.try_get::<&str, _>("state")? == "active",
            })
        })
        .transpose()
    }

    /// The user with this address or this id.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn user_find(&self, email: Option<&str>, id: Option<UserId>) -> Result<Option<UserRow>> {
        let row = sqlx::query("SELECT * FROM user_find($1, $2)")
            .bind(email)
            .bind(id)
            .fetch_optional(&self.pool)
            .await?;
        row.map(|row| {
            Ok(UserRow {
                id: row.try_get("user_id")?,
                email: row.try_get("email")?,
                name: row.try_get("name")?,
                password_hash: row.try_get("password_hash")?,
            })
        })
        .transpose()
    }

    /// Where a user is a member, the first membership first.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn user_tenants(&self, user: UserId) -> Result<Vec<MembershipRow>> {
        let rows = sqlx::query("SELECT * FROM user_tenants($1)").bind(user).fetch_all(&self.pool).await?;
        rows.iter()
            .map(|row| {
                Ok(MembershipRow {
                    tenant: row.try_get("tenant_id")?,
                    name: row.try_get("name")?,
                    role: role(row)?,
                })
            })
            .collect()
    }

    /// Set a user's password and end its sessions but this one.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn user_password(&self, user: UserId, hash: &str, but: Option<Uuid>) -> Result<()> {
        let set = sqlx::query("SELECT user_password($1, $2, $3)").bind(user).bind(hash).bind(but);
        set.execute(&self.pool).await?;
        Ok(())
    }

    /// How long logins for this address are locked.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn login_locked(&self, email_hash: &[u8; 32]) -> Result<Duration> {
        let seconds: f64 = sqlx::query_scalar("SELECT login_locked($1)")
            .bind(email_hash.as_slice())
            .fetch_one(&self.pool)
            .await?;
        Ok(Duration::try_from_secs_f64(seconds).unwrap_or_default())
    }

    /// Write down how a login went: `Some` when it failed, with the failures that are free, and the first and the longest
    /// lock.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn login_tried(
        &self,
        email_hash: &[u8; 32],
        failed: Option<(i32, Duration, Duration)>,
    ) -> Result<()> {
        sqlx::query("SELECT login_tried($1, $2, $3, $4)")
            .bind(email_hash.as_slice())
            .bind(failed.map(|f| f.0))
            .bind(failed.map(|f| interval(f.1)))
            .bind(failed.map(|f| interval(f.2)))
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    /// Begin a session.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn session_open(
        &self,
        session: Uuid,
        user: UserId,
        tenant: TenantId,
        hash: &[u8; 32],
        life: Duration,
    ) -> Result<()> {
        sqlx::query("SELECT session_open($1, $2, $3, $4, $5)")
            .bind(session)
            .bind(user)
            .bind(tenant)
            .bind(hash.as_slice())
            .bind(interval(life))
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    /// Exchange a refresh token for another, and go to another tenant if one is named.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn session_refresh(
        &self,
        hash: &[u8; 32],
        new: &[u8; 32],
        tenant: Option<TenantId>,
    ) -> Result<Refreshed> {
        let row = sqlx::query("SELECT * FROM session_refresh($1, $2, $3)")
            .bind(hash.as_slice())
            .bind(new.as_slice())
            .bind(tenant)
            .fetch_one(&self.pool)
            .await?;
        Ok(match row.try_get("outcome")? {
            "fine" => Refreshed::Fine(
                row.try_get("session_id")?,
                row.try_get("user_id")?,
                row.try_get("tenant_id")?,
            ),
            "unknown" => Refreshed::Unknown,
            "reused" => Refreshed::Reused(row.try_get("user_id")?, row.try_get("tenant_id")?),
            "stranger" => Refreshed::Stranger,
            other => return Err(Error::Corrupt(format!("session_refresh says {other}"))),
        })
    }

    /// End a session.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn session_end(&self, session: Uuid) -> Result<()> {
        sqlx::query("SELECT session_end($1)").bind(session).execute(&self.pool).await?;
        Ok(())
    }

    /// The open invitation with this hash: tenant, its name, address, role.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn invitation_find(&self, hash: &[u8; 32]) -> Result<Option<(TenantId, String, Role)>> {
        let row = sqlx::query("SELECT * FROM invitation_find($1)")
            .bind(hash.as_slice())
            .fetch_optional(&self.pool)
            .await?;
        row.map(|row| Ok((row.try_get("tenant_id")?, row.try_get("email")?, role(&row)?))).transpose()
    }

    /// Take an invitation, for a new user (with name and password hash) or one that is there. `None`: it is gone.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn invitation_accept(
        &self,
        hash: &[u8; 32],
        user: UserId,
        new: Option<(&str, &str)>,
    ) -> Result<Option<UserId>> {
        Ok(sqlx::query_scalar("SELECT invitation_accept($1, $2, $3, $4)")
            .bind(hash.as_slice())
            .bind(user)
            .bind(new.map(|n| n.0))
            .bind(new.map(|n| n.1))
            .fetch_one(&self.pool)
            .await?)
    }

    /// The keys that sign tokens, the newest first.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn issuer_keys(&self) -> Result<Vec<IssuerKeyRow>> {
        let rows = sqlx::query("SELECT * FROM issuer_keys_list()").fetch_all(&self.pool).await?;
        rows.iter()
            .map(|row| {
                Ok(IssuerKeyRow {
                    kid: row.try_get("kid")?,
                    seed: row.try_get("seed")?,
                    master: row.try_get("master")?,
                    public: row.try_get("public")?,
                    created_at: row.try_get("created_at")?,
                })
            })
            .collect()
    }

    /// Add a key unless there is one younger than `age`; forget those older than `forget`.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn issuer_key_add(
        &self,
        kid: &str,
        (seed, master): (&[u8], Option<&str>),
        public: &[u8],
        age: Duration,
        forget: Duration,
    ) -> Result<()> {
        sqlx::query("SELECT issuer_key_make($1, $2, $3, $4, $5, $6)")
            .bind(kid)
            .bind(seed)
            .bind(public)
            .bind(master)
            .bind(interval(age))
            .bind(interval(forget))
            .execute(&self.pool)
            .await?;
        Ok(())
    }
}

impl ApiStore {
    /// Replace a private half in the clear by the same sealed, if it is still what was read.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn issuer_key_seal(&self, kid: &str, old: &[u8], new: (&[u8], &str)) -> Result<bool> {
        issuer_key_seal(&self.pool, kid, old, new).await
    }
}

async fn issuer_key_seal(
    pool: &sqlx::PgPool,
    kid: &str,
    old: &[u8],
    (seed, master): (&[u8], &str),
) -> Result<bool> {
    let done = sqlx::query_scalar("SELECT issuer_key_seal($1, $2, $3, $4)");
    Ok(done.bind(kid).bind(old).bind(seed).bind(master).fetch_one(pool).await?)
}

fn member(row: &PgRow) -> Result<MemberRow> {
    Ok(MemberRow {
        id: row.try_get("user_id")?,
        email: row.try_get("email")?,
        name: row.try_get("name")?,
        role: role(row)?,
        since: row.try_get("created_at")?,
    })
}

fn invitation(row: &PgRow) -> Result<InvitationRow> {
    Ok(InvitationRow {
        id: row.try_get("invitation_id")?,
        email: row.try_get("email")?,
        role: role(row)?,
        invited_by: row.try_get("invited_by")?,
        created_at: row.try_get("created_at")?,
        expires_at: row.try_get("expires_at")?,
        accepted_at: row.try_get("accepted_at")?,
    })
}

const INVITATION: &str = "invitation_id, email, role, invited_by, created_at, expires_at, accepted_at";

impl TenantConn {
    /// Members, by id; or one of them.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn members(
        &mut self,
        user: Option<UserId>,
        after: Option<UserId>,
        limit: i64,
    ) -> Result<Vec<MemberRow>> {
        let rows = sqlx::query("SELECT * FROM members($1, $2, $3)")
            .bind(user)
            .bind(after)
            .bind(limit)
            .fetch_all(&mut **self)
            .await?;
        rows.iter().map(member).collect()
    }

    /// Give a member another role, or remove it (`None`). Answers done, unknown or last (the only owner).
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn member_change(&mut self, user: UserId, role: Option<Role>) -> Result<String> {
        Ok(sqlx::query_scalar("SELECT member_change($1, $2)")
            .bind(user)
            .bind(role.map(Role::as_str))
            .fetch_one(&mut **self)
            .await?)
    }

    /// Make an invitation, unless there are `max` that can be accepted.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn invitation_create(
        &mut self,
        new: &InvitationRow,
        hash: &[u8; 32],
        max: i64,
    ) -> Result<bool> {
        let made = sqlx::query(
            "INSERT INTO invitations (tenant_id, invitation_id, email, role, hash, invited_by, created_at, expires_at)
             SELECT $1, $2, $3, $4, $5, $6, $7, $8
             WHERE (SELECT count(*) FROM invitations
                    WHERE tenant_id = $1 AND accepted_at IS NULL AND expires_at > now()) < $9",
        )
        .bind(self.tenant())
        .bind(new.id)
        .bind(&new.email)
        .bind(new.role.as_str())
        .bind(hash.as_slice())
        .bind(&new.invited_by)
        .bind(new.created_at)
        .bind(new.expires_at)
        .bind(max)
        .execute(&mut **self)
        .await?;
        Ok(made.rows_affected() == 1)
    }

    /// Invitations, newest first.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn invitations(&mut self, after: Option<Uuid>, limit: i64) -> Result<Vec<InvitationRow>> {
        let rows = sqlx::query(&format!(
            "SELECT {INVITATION} FROM invitations WHERE tenant_id = $1 AND ($2::uuid IS NULL OR invitation_id < $2)
             ORDER BY invitation_id DESC LIMIT $3"
        ))
        .bind(self.tenant())
        .bind(after)
        .bind(limit)
        .fetch_all(&mut **self)
        .await?;
        rows.iter().map(invitation).collect()
    }

    /// Take an invitation back. `None`: there is none.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn invitation_delete(&mut self, id: Uuid) -> Result<Option<InvitationRow>> {
        let row = sqlx::query(&format!(
            "DELETE FROM invitations WHERE tenant_id = $1 AND invitation_id = $2 RETURNING {INVITATION}"
        ))
        .bind(self.tenant())
        .bind(id)
        .fetch_optional(&mut **self)
        .await?;
        row.as_ref().map(invitation).transpose()
    }
}

impl WorkerStore {
    /// Signing keys that another master key than this one seals: name, what is stored, and its master key.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn issuer_keys_to_rewrap(&self, master: &str) -> Result<Vec<(String, Vec<u8>, String)>> {
        let asked = sqlx::query_as("SELECT kid, seed, master FROM issuer_keys_sealed($1)").bind(master);
        Ok(asked.fetch_all(&self.pool).await?)
    }

    /// Replace what is stored of a signing key, if it is still what was read. False: it is not.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn issuer_key_rewrap(&self, kid: &str, old: &[u8], new: (&[u8], &str)) -> Result<bool> {
        issuer_key_seal(&self.pool, kid, old, new).await
    }

    /// Forget sessions and failed logins that are over, at most `limit` of each. Returns how many.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn people_tidy(&self, limit: i64) -> Result<u64> {
        let mut transaction = self.begin().await?;
        let gone: i64 =
            sqlx::query_scalar("SELECT people_tidy($1)").bind(limit).fetch_one(&mut *transaction).await?;
        transaction.commit().await?;
        Ok(gone.unsigned_abs())
    }
}

/// Make a user with this role in a tenant, or give an existing one a new password and this role. As the owner of the schema:
/// how the first one comes in, and how a lost one comes back.
///
/// # Errors
/// Postgres does not answer, or there is no such tenant.
pub async fn make_user(
    admin_url: &str,
    tenant: &str,
    email: &str,
    name: &str,
    password_hash: &str,
    role: Role,
) -> anyhow::Result<()> {
    let options =
        admin_url.parse::<sqlx::postgres::PgConnectOptions>()?.options([("search_path", "sandbar")]);
    let mut connection = PgConnection::connect_with(&options).await.context("cannot connect to Postgres")?;
    let mut transaction = connection.begin().await?;
    let tenant: Option<TenantId> = sqlx::query_scalar("SELECT tenant_id FROM tenants WHERE name = $1")
        .bind(tenant)
        .fetch_optional(&mut *transaction)
        .await?;
    let tenant = tenant.context("there is no such tenant")?;
    let user: UserId = sqlx::query_scalar(
        "INSERT INTO users (user_id, email, name, password_hash) VALUES ($1, $2, $3, $4)
         ON CONFLICT (email) DO UPDATE SET password_hash = EXCLUDED.password_hash, password_at = clock_timestamp()
         RETURNING user_id",
    )
    .bind(UserId::generate())
    .bind(email)
    .bind(name)
    .bind(password_hash)
    .fetch_one(&mut *transaction)
    .await?;
    for statement in [
        "INSERT INTO memberships (tenant_id, user_id, role) VALUES ($1, $2, $3)
         ON CONFLICT (tenant_id, user_id) DO UPDATE SET role = EXCLUDED.role",
        "UPDATE sessions SET ended_at = clock_timestamp() WHERE user_id = $2 AND ended_at IS NULL AND $1 IS NOT NULL AND $3 <> ''",
    ] {
        sqlx::query(statement).bind(tenant).bind(user).bind(role.as_str()).execute(&mut *transaction).await?;
    }
    sqlx::query("DELETE FROM login_failures WHERE email_hash = sha256(convert_to($1, 'UTF8'))")
        .bind(email)
        .execute(&mut *transaction)
        .await?;
    sqlx::query(
        "INSERT INTO audit (tenant_id, audit_id, at, actor_kind, actor, operation, target, outcome, status, times, after)
         VALUES ($1, $2, now(), 'nobody', 'command on the server', 'sandbar user create-admin', $3, 'done', 0, 1,
           jsonb_build_object('email', $3, 'role', $4))",
    )
    .bind(tenant)
    .bind(Uuid::now_v7())
    .bind(email)
    .bind(role.as_str())
    .execute(&mut *transaction)
    .await?;
    transaction.commit().await?;
    connection.close().await?;
    Ok(())
}
