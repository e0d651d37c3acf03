use zcproto::{Client, ConnectOptions, Credentials, Value};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let address = std::env::args().nth(1).unwrap_or("localhost:7443".into());
    let home = std::env::var("ZCPROTO_HOME").or(std::env::var("HOME").map(|home| home + "/.zeroclaw"))?;
    let login = Credentials::login(|| async {
        let fields = [("scheme", "password"), ("user", "ada"), ("password", "correct horse")];
        Ok(Value::Map(fields.map(|(name, text)| (name.into(), text.into())).into()))
    });
    let options = ConnectOptions::new(address).credentials(login).ca_file(home + "/certs/ca.crt");
    let client = Client::connect(options).await?;
    println!("{}", client.call::<String>("who", &()).await?); // ada
    client.close().await;
    Ok(())
}
